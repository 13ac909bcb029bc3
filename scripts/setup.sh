#!/usr/bin/env bash
# Sets pi_rl up in .venv: Python packages at the pinned versions and, if nothing renders, the system's OpenGL (and, for
# ManiSkill, Vulkan) libraries. Done once: a stamp in .venv makes later calls return at once. Package indexes are those
# the machine is set up for.
#
# Usage: scripts/setup.sh [EXTRAS]      e.g. test,lint,docs,notebooks,libero,maniskill; default: PI_RL_EXTRAS, or test,lint
#
# What an earlier call installed stays installed.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=$ROOT/.venv
LOG=$VENV/setup.log
STAMP=$VENV/setup.stamp
EXTRAS=${1:-${PI_RL_EXTRAS:-test,lint}}
VULKAN_PACKAGES=(libvulkan1 mesa-vulkan-drivers)
BACKPORTS=bookworm-backports
APT_PACKAGES=(libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libosmesa6)

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

# Runs a command with its output in the log; shows the log's end if it fails.
logged() {
    printf '\n$ %s\n' "$*" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1 </dev/null; then
        tail -n 25 "$LOG" >&2
        return 1
    fi
}

# What this set-up depends on; the folder counts because a virtual environment cannot be moved.
fingerprint() {
    { cat pyproject.toml constraints.txt .python-version scripts/setup.sh; printf '%s\n' "$ROOT"; } | sha256sum | cut -d' ' -f1
}

# Prints those of the comma-separated names in $1 that $2 lacks.
missing_extras() {
    local name
    for name in ${1//,/ }; do
        [[ ,$2, == *,"$name",* ]] || printf '%s ' "$name"
    done
}

has_extra() { [[ ,$EXTRAS, == *,"$1",* ]]; }

is_python312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

# Prints the first Python 3.12. A pyenv shim fails when .python-version names a release that is not installed, so the
# interpreters behind the shims and of the system are tried as well.
find_python() {
    local candidate
    for candidate in python python3.12 python3 /usr/bin/python3.12 /usr/local/bin/python3.12 /usr/bin/python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
        if is_python312 "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    if command -v uv >/dev/null 2>&1; then
        uv python find --no-python-downloads --no-project 3.12 2>/dev/null || true
    fi
}

make_venv() {
    local python
    if [ -e "$VENV" ] && ! is_python312 "$VENV/bin/python"; then
        say "removing .venv: it has no working Python 3.12"
        rm -rf "$VENV"
    fi
    if [ ! -e "$VENV" ]; then
        python=$(find_python)
        if [ -n "$python" ]; then
            say "creating .venv with $("$python" -c 'import platform; print("Python", platform.python_version())')"
            if command -v uv >/dev/null 2>&1; then
                uv venv --quiet --seed --no-project --python "$python" "$VENV" </dev/null
            elif ! "$python" -m venv "$VENV"; then
                rm -rf "$VENV"
                fail "$python cannot create a virtual environment (see above). On Debian or Ubuntu:" \
                    "apt-get install -y python3.12-venv. Then run this again."
            fi
        elif command -v uv >/dev/null 2>&1; then
            say "no Python 3.12 found: uv downloads one into .python"
            UV_PYTHON_INSTALL_DIR=$ROOT/.python uv venv --quiet --seed --no-project --python 3.12 "$VENV" </dev/null
        else
            fail "Python 3.12 was not found (tried python, python3.12, python3 and pyenv). Install it, for example with" \
                "'pyenv install $(cat .python-version)' or your system's packages, and run this again."
        fi
    fi
    : >"$LOG"
}

# uv is many times faster than pip; pip does the same work where uv cannot be had or cannot reach an index.
install_packages() {
    local uv="" target=".[$EXTRAS]"
    say "installing the packages of constraints.txt (several GB the first time); details in .venv/setup.log"
    if command -v uv >/dev/null 2>&1; then
        uv=$(command -v uv)
    elif [ -x "$VENV/bin/uv" ] || logged "$VENV/bin/python" -m pip install --quiet --constraint constraints.txt uv; then
        uv=$VENV/bin/uv
    fi
    if [ -n "$uv" ] && logged "$uv" pip install --python "$VENV/bin/python" --constraint constraints.txt --editable "$target"; then
        return
    fi
    say "uv did not succeed; trying pip"
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        logged "$VENV/bin/python" -m ensurepip || fail "the packages could not be installed: see the lines above."
    fi
    logged "$VENV/bin/python" -m pip install --constraint constraints.txt --editable "$target" ||
        fail "the packages could not be installed: see the lines above and .venv/setup.log."
}

# Draws one red sphere in a fresh process and looks at the pixels.
renders_with() {
    MUJOCO_GL=$1 "$VENV/bin/python" - >>"$LOG" 2>&1 <<'PYTHON'
import mujoco

model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='sphere' size='1' rgba='1 0 0 1'/></worldbody></mujoco>"
)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    frame = renderer.render()
assert frame[..., 0].max() > 50 and frame[..., 1].max() < frame[..., 0].max(), "the image does not show the sphere"
PYTHON
}

# Prints the first backend that renders, if any.
find_renderer() {
    local backend
    for backend in ${MUJOCO_GL:-} egl osmesa; do
        if renders_with "$backend"; then
            printf '%s' "$backend"
            return
        fi
    done
}

# Installs packages of the system, as root or with sudo. First argument: what does not work yet. $APT_OPTIONS: more options.
install_system_packages() {
    local problem=$1 sudo=() hint
    shift
    hint="${APT_SOURCE:+echo '$APT_SOURCE' > $APT_SOURCE_FILE && }apt-get update && apt-get install -y"
    hint+=" --no-install-recommends ${APT_OPTIONS[*]:-} $*"
    if ! command -v apt-get >/dev/null 2>&1; then
        problem+=" (details in .venv/setup.log). Install your system's counterparts of these packages of Debian and Ubuntu"
        fail "$problem: $*. Then run this again."
    fi
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null 2>&1 || ! sudo -n true 2>/dev/null; then
            fail "$problem (details in .venv/setup.log), and this user may not install packages." \
                "Run as root, then run this again: $hint"
        fi
        sudo=(sudo -n)
    fi
    say "$problem: installing $*"
    if [ -n "$APT_SOURCE" ]; then
        printf '%s\n' "$APT_SOURCE" | "${sudo[@]}" tee "$APT_SOURCE_FILE" >/dev/null
    fi
    # A failing update of one source need not matter, the installation tells.
    logged "${sudo[@]}" apt-get update -qq || say "apt-get update reported a problem; going on"
    logged "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        ${APT_OPTIONS[@]+"${APT_OPTIONS[@]}"} "$@" || {
        [ -z "$APT_SOURCE" ] || "${sudo[@]}" rm -f "$APT_SOURCE_FILE" # a source that does not answer spoils every update
        fail "apt-get could not install the packages: see the lines above. Run it yourself: $hint"
    }
}

# LIBERO's dependencies hold two sources in C++ that are built with cmake.
prepare_build_tools() {
    export CMAKE_POLICY_VERSION_MINIMUM=${CMAKE_POLICY_VERSION_MINIMUM:-3.5} # one asks for CMake 3.1, which 4 refuses
    if has_extra libero && ! { command -v cmake && command -v c++ && command -v make; } >/dev/null 2>&1; then
        install_system_packages "LIBERO's packages need a C++ compiler and cmake" cmake g++ make
    fi
}

set_up_opengl() {
    local renderer
    renderer=$(find_renderer)
    if [ -z "$renderer" ]; then
        install_system_packages "MuJoCo cannot render: neither EGL nor OSMesa works" "${APT_PACKAGES[@]}"
        renderer=$(find_renderer)
        [ -n "$renderer" ] || fail "MuJoCo still cannot render with EGL or OSMesa; .venv/setup.log says why." \
            "In a container, check that the graphics driver's libraries are not hidden, then run this again."
    fi
    say "MuJoCo renders with $renderer"
}

vulkan_works() { logged_quietly "$VENV/bin/python" -P -m pi_rl.envs.vulkan; }

logged_quietly() {
    printf '\n$ %s\n' "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 </dev/null
}

# The backports of Debian 12, whose own Mesa is too old; the mirror is the one that the machine already uses.
choose_backports() {
    local mirror sources=(/etc/apt/sources.list /etc/apt/sources.list.d)
    [ "$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")" = bookworm ] || return 0
    if ! grep -rqsE "^(deb|Suites:)[^#]*$BACKPORTS" "${sources[@]}"; then
        mirror=$(grep -rhsoE '(^URIs: *|^deb +(\[[^]]*\] +)?)https?://[^ ]+/debian/?( |$)' "${sources[@]}" |
            grep -oE 'https?://[^ ]+' | head -n 1 || true)
        [ -n "$mirror" ] || return 0
        APT_SOURCE="deb $mirror $BACKPORTS main"
    fi
    APT_OPTIONS=(-t "$BACKPORTS")
}

# SAPIEN, under ManiSkill, does not even start without Vulkan. Its absence must not stop those who want something else.
set_up_vulkan() {
    has_extra maniskill || return 0
    if ! vulkan_works; then
        choose_backports
        # in a subshell: `fail` ends that alone
        (install_system_packages "ManiSkill cannot draw: no working Vulkan" "${VULKAN_PACKAGES[@]}") || true
        vulkan_works || {
            say "WARNING: ManiSkill will not run on this machine; everything else does. It says:"
            "$VENV/bin/python" -P -m pi_rl.envs.vulkan >&2 || true
            [ -z "${CI:-}" ] || exit 1
            return 0
        }
    fi
    say "ManiSkill draws with Vulkan"
}

# The tests look at reports in a browser; its absence must not stop those who want something else.
set_up_browser() {
    has_extra docs || return 0
    APT_OPTIONS=() APT_SOURCE=""
    if ! command -v chromium >/dev/null 2>&1; then
        (install_system_packages "the tests of HTML pages need Chromium" chromium) || {
            say "WARNING: the tests of HTML pages will fail on this machine; everything else works."
            [ -z "${CI:-}" ] || exit 1
        }
    fi
}

main() {
    local mark installed=""
    mark=$(fingerprint)
    if [ -x "$VENV/bin/python" ] && [ -f "$STAMP" ]; then
        installed=$(sed -n 2p "$STAMP")
        if [ "$(sed -n 1p "$STAMP")" = "$mark" ] && [ -z "$(missing_extras "$EXTRAS" "$installed")" ]; then
            return
        fi
        EXTRAS=$EXTRAS$(for name in $(missing_extras "$installed" "$EXTRAS"); do printf ',%s' "$name"; done)
    fi
    make_venv
    rm -f "$STAMP"
    prepare_build_tools
    install_packages
    set_up_opengl
    set_up_vulkan
    set_up_browser
    printf '%s\n%s\n' "$mark" "$EXTRAS" >"$STAMP"
    say "done ($EXTRAS)"
}

APT_OPTIONS=() APT_SOURCE="" APT_SOURCE_FILE=/etc/apt/sources.list.d/pi_rl-backports.list
main
