# One image per service, and one for people: docker build --target command|projection|query|watershed .

FROM rust:1.95-slim-bookworm AS build
# For the allocator.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /watershed
COPY . .
# For the services' metadata: docker compose build --build-arg WATERSHED_REVISION=$(git rev-parse --short=12 HEAD)
ARG WATERSHED_REVISION=unknown
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/watershed/target \
    cargo build --profile image --locked --package command-service --package projection-service --package query-service \
        --package watershed \
    && mkdir /programs \
    && cp target/image/command-service target/image/projection-service target/image/query-service \
        target/image/watershed /programs/

FROM debian:bookworm-slim AS service
RUN useradd --system --no-create-home watershed
USER watershed
ENV READY_FILE=/tmp/ready
HEALTHCHECK --interval=5s --timeout=2s --start-period=60s --retries=3 CMD test -e "$READY_FILE"

FROM service AS command
COPY --from=build /programs/command-service /usr/local/bin/
ENTRYPOINT ["command-service"]

FROM service AS projection
COPY --from=build /programs/projection-service /usr/local/bin/
ENTRYPOINT ["projection-service"]

FROM service AS query
COPY --from=build /programs/query-service /usr/local/bin/
ENTRYPOINT ["query-service"]

FROM debian:bookworm-slim AS watershed
RUN useradd --system --no-create-home watershed
USER watershed
COPY --from=build /programs/watershed /usr/local/bin/
ENTRYPOINT ["watershed"]
