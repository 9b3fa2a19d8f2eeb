//! Which addresses may be dialled, and the only way to dial one.
