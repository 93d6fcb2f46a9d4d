#!/usr/bin/env bash
# Builds the image of docker/Dockerfile without an engine, and starts it as a cluster would: as its user, with a read-only
# root. It checks that the server compiles its layers there, gets ready, answers /score, and ends with 0 after SIGTERM. Needs
# root, and from Debian:
#
#     apt-get install buildah mmdebstrap curl
#     deploy/rehearse.sh [TARGET]    # server (the default); others are built, and not started
#
# It takes about 20 minutes of processor time, and 6 GB in $WORK.
# The base image is made of Debian's own Python with its headers, which torch.compile includes; no image registry is needed
# then. Optional variables:
#   WORK            folder of the image store and of logs (default build/rehearsal)
#   WHEELS          folder of wheels that pip prefers, such as one with a CPU build of torch
#   CERTIFICATES    CA bundle for pip
#   DRIVER          storage driver (default overlay; vfs where the kernel has no overlays, with several times the space)
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-server}
work=$(realpath -m "${WORK:-build/rehearsal}")
port=${PORT:-18000}
mkdir -p "$work"
buildah=(buildah --root "$work/store" --runroot "$work/run" --storage-driver "${DRIVER:-overlay}")

say() { printf '== %s\n' "$*"; }

base_image() {
    "${buildah[@]}" inspect localhost/rehearsal-base >/dev/null 2>&1 && return
    say "base image: Debian bookworm with Python"
    [ -f "$work/base.tar" ] || mmdebstrap --mode=root --variant=minbase --include=python3-dev,python3-venv,ca-certificates bookworm "$work/base.tar"
    printf 'FROM scratch\nADD base.tar /\nRUN ln -s /usr/bin/python3 /usr/local/bin/python\n' >"$work/base.Dockerfile"
    "${buildah[@]}" bud --isolation chroot --file "$work/base.Dockerfile" --tag localhost/rehearsal-base "$work"
}

image() {
    say "every instruction of docker/Dockerfile, target $target"
    local mounts=()
    printf '[global]\n' >"$work/pip.conf"
    if [ -n "${WHEELS:-}" ]; then
        mounts+=(--volume "$WHEELS:/wheels-of-the-host:ro")
        echo "find-links = /wheels-of-the-host" >>"$work/pip.conf"
    fi
    if [ -n "${CERTIFICATES:-}" ]; then
        mounts+=(--volume "$CERTIFICATES:/certificates.pem:ro")
        echo "cert = /certificates.pem" >>"$work/pip.conf"
    fi
    "${buildah[@]}" bud --isolation chroot --pull-never --timestamp "$(git log -1 --format=%ct)" \
        --volume "$work/pip.conf:/etc/pip.conf:ro" "${mounts[@]}" \
        --build-arg BASE=localhost/rehearsal-base --build-arg REVISION="$(git rev-parse HEAD)" \
        --file docker/Dockerfile --target "$target" --tag "localhost/marginrm-$target" .
}

setting() { "${buildah[@]}" inspect --type image --format "{{range .OCIv1.Config.$1}}{{.}}{{\"\\n\"}}{{end}}" "localhost/marginrm-$target"; }

serve() {
    say "server as its user in a read-only root"
    local container root refused
    container=$("${buildah[@]}" from --pull-never "localhost/marginrm-$target")
    root=$("${buildah[@]}" mount "$container")
    mapfile -t environment < <(setting Env)
    mapfile -t command < <(setting Entrypoint; setting Cmd)
    user=$("${buildah[@]}" inspect --type image --format '{{.OCIv1.Config.User}}' "localhost/marginrm-$target")
    [ "$user" != 0 ] && [ -n "$user" ]
    unshare --mount --fork --kill-child bash -c '
        root=$1 user=$2; shift 2
        mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
        mount -t tmpfs tmpfs "$root/tmp" && mount --rbind /dev "$root/dev" && mount -t proc proc "$root/proc"
        exec chroot --userspec="$user" "$root" "$@"
    ' rehearsal "$root" "$user" env -i "${environment[@]}" "${command[@]}" --port "$port" --compile on >"$work/server.log" 2>&1 &
    local outer=$! server=""
    for _ in $(seq 600); do
        curl --silent --fail "http://127.0.0.1:$port/readyz" >/dev/null && break
        kill -0 "$outer" || { cat "$work/server.log"; return 1; }
        sleep 1
    done
    server=$(pgrep --parent "$outer")
    # In the mount namespace of the server, where the root is read-only.
    refused=$(nsenter --mount --target "$server" chroot --userspec="$user" "$root" touch /models/x 2>&1) && return 1
    curl --silent --fail "http://127.0.0.1:$port/v1/models" | tee "$work/models.json"
    echo
    say "ready as $(ps -o uid= -p "$server"), and cannot write: $refused"
    curl --silent --show-error --fail "http://127.0.0.1:$port/score" --header 'Content-Type: application/json' --data \
        '{"pairs": [{"prompt": "What is 2 + 2?", "chosen": "4.", "rejected": "Five."}]}' | tee "$work/reply.json"
    echo
    grep --quiet '"margin"' "$work/reply.json"
    say "SIGTERM"
    kill -TERM "$server"
    wait "$outer"
    say "ended with 0"
    "${buildah[@]}" umount "$container" >/dev/null
}

base_image
image
if [ "$target" = server ]; then serve; fi
say "rehearsed: $target"
