#!/bin/bash
# Mount the Lustre file system at /fsx: lustre.sh ADDRESS NAME
set -euo pipefail

if ! mountpoint --quiet /fsx; then
    sudo dnf install --assumeyes --quiet lustre-client
    sudo mkdir --parents /fsx
    sudo mount --types lustre --options relatime,flock "$1@tcp:/$2" /fsx
fi
