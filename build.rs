//! Makes a new migration file rebuild what embeds it.
fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
