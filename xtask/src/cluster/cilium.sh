#!/bin/sh
# Runs Cilium's agent in a mount namespace of its own: SOURCE PLUGIN AGENT ARGUMENTS...
set -e
mkdir -p /var/lib/cilium
ln -sfn "$1/bpf" /var/lib/cilium/bpf
ln -sf "$2" /usr/lib/cni/cilium-cni
shift 2
# A kernel without loadable modules has no list of those that are loaded: the agent is shown an empty one.
if ! [ -e /proc/modules ]; then
    mkdir -p /run/cilium/proc "/lib/modules/$(uname -r)"
    : >> "/lib/modules/$(uname -r)/modules.builtin"
    mount --rbind /proc /run/cilium/proc
    mount -t tmpfs tmpfs /proc
    ln -s /run/cilium/proc/* /proc/
    : > /proc/modules
fi
exec "$@"
