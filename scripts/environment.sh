# Sourced by other scripts in the root folder of the project: `install FILE...` installs the requirement files into .venv,
# unless they are installed already, and puts .venv first on the PATH.

install() {
    local python="${PYTHON:-python3}" file stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "Python 3.11 or newer is needed; set PYTHON to one (PYTHON=python3.12 $0)" >&2
        exit 2
    fi
    if [ ! -x .venv/bin/pip ] && ! "$python" -m venv .venv; then
        echo "$python cannot create .venv; on Debian and Ubuntu install python3-venv" >&2
        exit 2
    fi
    for file in "$@"; do
        stamp=".venv/installed-$(cksum < "$file" | tr ' ' -)"
        if [ ! -e "$stamp" ]; then
            echo "installing $file into .venv (torch with its CUDA libraries is a large download)"
            .venv/bin/pip install --quiet --disable-pip-version-check --requirement "$file"
            touch "$stamp"
        fi
    done
    PATH="$PWD/.venv/bin:$PATH"
}
