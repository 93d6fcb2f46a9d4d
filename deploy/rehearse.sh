#!/usr/bin/env bash
# Builds an image of docker/Dockerfile without an engine, and starts it as a cluster would: as its user, as process 1, with a
# read-only root and a tmpfs at /tmp. Needs root, and from Debian:
#
#     apt-get install buildah mmdebstrap curl
#     deploy/rehearse.sh [TARGET]
#
# What it checks of each TARGET:
#   server (the default)   compiles its layers, gets ready, answers /score, and ends with 0 after SIGTERM
#   ray                    starts Ray, deploys deploy/ray-serve/serve.yaml with the model in $MODEL, and answers /score
#   train                  trains examples/quickstart.toml in a mounted folder, and writes the checkpoint as its user
#   others                 are built, and not started
#
# The first image takes about 20 minutes of processor time and 6 GB in $WORK; others share its layers.
# The base image is made of Debian's own Python with its headers, which torch.compile includes; no image registry is needed
# then. Optional variables:
#   WORK            folder of the image store and of logs (default build/rehearsal)
#   MODEL           the demo checkpoint for ray and train (default checkpoints/demo, which `make serve` writes)
#   WHEELS          folder of wheels that pip prefers, such as one with a CPU build of torch
#   CERTIFICATES    CA bundle for pip
#   PORT            port of the server (default 18000)
#   DRIVER          storage driver (default overlay; vfs where the kernel has no overlays, with several times the space)
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-server}
model=${MODEL:-checkpoints/demo}
work=$(realpath -m "${WORK:-build/rehearsal}")
port=${PORT:-18000}
mkdir -p "$work"
buildah=(buildah --root "$work/store" --runroot "$work/run" --storage-driver "${DRIVER:-overlay}")
outer="" first="" container=""
running() { [ -n "$outer" ] && kill -0 "$outer" 2>/dev/null; }
clean() {
    if running; then kill -KILL "$first" && wait "$outer"; fi  # process 1 takes all others of its container along
    [ -z "$container" ] || "${buildah[@]}" rm "$container" >/dev/null
}
trap clean EXIT

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
    "${buildah[@]}" bud --layers --isolation chroot --pull-never --timestamp "$(git log -1 --format=%ct)" \
        --volume "$work/pip.conf:/etc/pip.conf:ro" "${mounts[@]}" \
        --build-arg BASE=localhost/rehearsal-base --build-arg REVISION="$(git rev-parse HEAD)" \
        --file docker/Dockerfile --target "$target" --tag "localhost/marginrm-$target" .
}

setting() { "${buildah[@]}" inspect --type image --format "{{range .OCIv1.Config.$1}}{{.}}{{\"\n\"}}{{end}}" "localhost/marginrm-$target"; }
scalar() { "${buildah[@]}" inspect --type image --format "{{.OCIv1.Config.$1}}" "localhost/marginrm-$target"; }

# Makes a container of the image, and reads its settings.
make_container() {
    say "container of $target"
    container=$("${buildah[@]}" from --pull-never "localhost/marginrm-$target")
    root=$("${buildah[@]}" mount "$container")
    mapfile -t environment < <(setting Env)
    mapfile -t command < <(setting Entrypoint; setting Cmd)
    user=$(scalar User)
    folder=$(scalar WorkingDir)
    case ${user%%:*} in '' | 0 | root) say "the image runs as root"; return 1 ;; esac
}

# start LOG VOLUME COMMAND...: starts a command as process 1 of the container; VOLUME is FOLDER:PATH or empty.
start() {
    local log=$1 volume=$2
    shift 2
    unshare --mount --pid --fork --kill-child bash -ec '
        root=$1 user=$2 folder=$3 volume=$4; shift 4
        mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
        mount -t tmpfs tmpfs "$root/tmp" && mount --rbind /dev "$root/dev" && mount -t proc proc "$root/proc"
        [ -z "$volume" ] || mount --bind "${volume%:*}" "$root${volume#*:}"
        exec chroot --userspec="$user" "$root" env --ignore-environment --chdir="$folder" "$@"
    ' rehearsal "$root" "$user" "$folder" "$volume" "${environment[@]}" "$@" >"$log" 2>&1 &
    outer=$!
    until first=$(pgrep --parent "$outer") || ! running; do sleep 0.1; done
}

# beside COMMAND...: runs a command in the same container.
beside() {
    nsenter --mount --pid --target "$first" \
        chroot --userspec="$user" "$root" env --ignore-environment --chdir="$folder" "${environment[@]}" "$@"
}

# await URL LOG: waits until the first process answers, for 10 minutes.
await() {
    for _ in $(seq 600); do
        curl --silent --fail "$1" >/dev/null && return
        running || break
        sleep 1
    done
    cat "$2"
    return 1
}

score() {
    curl --silent --show-error --fail "http://127.0.0.1:$port/score" --header 'Content-Type: application/json' --data \
        '{"pairs": [{"prompt": "What is 2 + 2?", "chosen": "4.", "rejected": "Five."}]}' | tee "$work/reply.json"
    echo
    grep --quiet '"margin"' "$work/reply.json"
}

# ended LOG: waits for process 1, which must end with 0.
ended() {
    wait "$outer" || { cat "$1"; return 1; }
    say "ended with 0"
}

rehearse_server() {
    local refused
    start "$work/server.log" "" "${command[@]}" --port "$port" --compile on
    await "http://127.0.0.1:$port/readyz" "$work/server.log"
    refused=$(beside touch /models/x 2>&1) || true
    case $refused in *"Read-only file system"*) ;; *) say "the root can be written to: $refused"; return 1 ;; esac
    curl --silent --fail "http://127.0.0.1:$port/v1/models" | tee "$work/models.json"
    echo
    say "ready as $(ps -o uid= -p "$first"), and cannot write: $refused"
    score
    say "SIGTERM"
    kill -TERM "$first"
    ended "$work/server.log"
}

rehearse_ray() {
    rm -rf "$work/ray" && mkdir -p "$work/ray"
    cp -r "$model" "$work/ray/reward"
    sed "s/^  port: .*/  port: $port/" deploy/ray-serve/serve.yaml >"$work/ray/serve.yaml"
    chmod -R go+rX "$work/ray"
    start "$work/ray.log" "$work/ray:/models" "${command[@]}" --num-cpus 2
    await http://127.0.0.1:8265/api/version "$work/ray.log"
    beside serve deploy --address http://127.0.0.1:8265 serve.yaml
    await "http://127.0.0.1:$port/readyz" "$work/ray.log"
    beside serve status --address http://127.0.0.1:8265
    score
    say "SIGTERM: Ray drains its only node, in vain, for 30 s"
    kill -TERM "$first"
    wait "$outer" || say "Ray ended with $?"
}

rehearse_train() {
    rm -rf "$work/train" && mkdir -p "$work/train/checkpoints"
    cp examples/quickstart.toml "$work/train/"
    cp -r "$model" "$work/train/checkpoints/demo"
    chown -R "$user" "$work/train"
    start "$work/train.log" "$work/train:/work" "${command[@]}" quickstart.toml
    ended "$work/train.log"
    tail -n 3 "$work/train.log"
    owner=$(stat --format %u:%g "$work/train/checkpoints/quickstart/reward_manifest.json")
    say "written by $owner"
    [ "$owner" = "$user" ]
}

if [ "$target" = ray ] || [ "$target" = train ]; then
    [ -f "$model/config.json" ] || { say "$model is not a checkpoint; make serve trains checkpoints/demo, or set MODEL"; exit 1; }
fi
base_image
image
if declare -F "rehearse_$target" >/dev/null; then
    make_container
    "rehearse_$target"
fi
say "rehearsed: $target"
