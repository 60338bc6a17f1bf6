#!/bin/bash
# Make a fresh machine with Amazon Linux 2023 a host: caches on its local disks, and the packages as they were tested. Done
# again it changes nothing, and what an image of yours brings along (~/cache, ~/venv) stays as it is.
set -euo pipefail

if [ ! -e ~/cache ]; then
    mapfile -t disks < <(lsblk --nodeps --noheadings --output PATH,MODEL | awk '/EC2 NVMe Instance Storage/ {print $1}')
    if mountpoint --quiet /opt/dlami/nvme; then # where AWS's images with GPUs put them all
        place=/opt/dlami/nvme
    elif [ "${#disks[@]}" -gt 0 ]; then
        place=/local
        sudo dnf install --assumeyes --quiet mdadm xfsprogs
        sudo mdadm --create /dev/md/local --run --force --level=0 --raid-devices="${#disks[@]}" "${disks[@]}"
        sudo mkfs.xfs -q /dev/md/local
        sudo mkdir --parents "$place"
        sudo mount --options noatime /dev/md/local "$place"
    fi
    if [ "${place:-}" ]; then
        sudo install --directory --owner="$(id --user)" "$place/cache"
        ln --symbolic "$place/cache" ~/cache
    else
        mkdir ~/cache
    fi
fi

if [ ! -x ~/venv/bin/ray ]; then
    command -v nvidia-smi > /dev/null || export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
    sudo dnf install --assumeyes --quiet python3.11 python3.11-pip
    python3.11 -m venv ~/venv
    install=(~/venv/bin/pip install --quiet --no-cache-dir --constraint ~/vswin/constraints.txt)
    "${install[@]}" setuptools wheel torch numpy # DeepSpeed's own build asks for torch
    "${install[@]}" --no-build-isolation ~/vswin'[train,serve,server]'
fi
