#!/bin/bash
# Starts MongoDB. The members of a replica set with users need a common key, in a file that only the server may read.
set -euo pipefail

key=/run/key
touch $key
chmod 400 $key
if [ -n "${MONGODB_KEY_FILE:-}" ]; then
  cat "$MONGODB_KEY_FILE" > $key
else
  printf %s "$MONGODB_KEY" > $key
fi
chown mongodb $key
exec docker-entrypoint.sh "$@"
