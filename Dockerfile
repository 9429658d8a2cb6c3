# pgcutover and proxyctl in one image. Build: docker build -t pgcutover .
# Run:  docker run -v ./pgcutover.toml:/etc/pgcutover/pgcutover.toml:ro -v pgcutover:/var/lib/pgcutover -p 6432:6432 pgcutover
# In a container listen_addr is "0.0.0.0", and state_dir is /var/lib/pgcutover: a route that is lost with the container is
# found again from the decisions in the databases, but the proxy starts a second later for it.

FROM rust:1.95-bookworm AS build
# The toolchain of the image, not a newer stable that rust-toolchain.toml would have fetched.
ENV RUSTUP_TOOLCHAIN=1.95.0 CARGO_TERM_COLOR=never
WORKDIR /src
COPY . .
# Fat LTO and one codegen unit (profile release): minutes to build, and what the measurements were made with.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked -p pgcutover -p proxyctl \
 && install -D -t /out target/release/pgcutover target/release/proxyctl

FROM debian:bookworm-slim
# Certificates for sslrootcert = "system"; everything else is in the binaries.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /var/lib/pgcutover --create-home --shell /usr/sbin/nologin pgcutover
COPY --from=build /out/pgcutover /out/proxyctl /usr/local/bin/
USER pgcutover
WORKDIR /var/lib/pgcutover
VOLUME /var/lib/pgcutover
# Clients; metrics and health pages (http_addr).
EXPOSE 6432 9127
# SIGTERM: no new clients, the others finish their transactions. Give it time: docker stop -t 60.
STOPSIGNAL SIGTERM
# proxyctl: docker run --rm --entrypoint proxyctl … -c /etc/pgcutover/cutover.toml status
ENTRYPOINT ["pgcutover"]
CMD ["/etc/pgcutover/pgcutover.toml"]
