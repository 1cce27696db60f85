#!/bin/sh
# Starts the NATS server with the passwords of nats.conf in its environment, those from files too.
set -eu
. /watershed/passwords.sh

for user in COMMAND PROJECTION QUERY SUBSCRIBER CLIENT OPERATOR SYS; do
  password=$(value "NATS_${user}_PASSWORD")
  export "NATS_${user}_PASSWORD=$password"
done
exec nats-server "$@"
