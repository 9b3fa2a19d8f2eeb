# syntax=docker/dockerfile:1
# The worker alone: the binary and the system's certificate roots.

FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /build
COPY . .
# The caches stay outside the image, so the binary is copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/build/target,sharing=locked \
    cargo build --release --locked --bin sendoff \
    && install -D -m 0755 target/release/sendoff /out/sendoff

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/sendoff /usr/local/bin/sendoff
USER 10001:10001
EXPOSE 8080
ENTRYPOINT ["sendoff"]
CMD ["worker"]
