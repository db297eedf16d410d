#!/bin/sh
# Installs rft from this folder, without a network: ./install [FOLDER], by default ~/rft.
# Needs Python @PYTHON@ with venv and nothing else; PYTHON=/path/to/python names one that is not on PATH.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
found=
for python in ${PYTHON:+"$PYTHON"} python@PYTHON@ python3 python; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if [ "$version" = "@PYTHON@" ]; then
        if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
            exec "$python" "$here/install.py" "$@"
        fi
        version="$version without venv"
    fi
    found="$found $python is $version;"
done
echo "install: this bundle needs Python @PYTHON@ with venv;${found:- there is no Python here}" >&2
echo "  cure: install it (your system's python@PYTHON@ and python@PYTHON@-venv packages), or name it:" \
    "PYTHON=/path/to/python@PYTHON@ ./install; or make the bundle with \`rft bundle --python\`" >&2
exit 2
