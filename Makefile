# SPDX-License-Identifier: LGPL-2.1-or-later
# Short names for the scripts; each says at its top what it does.

.PHONY: all demo test check bench package install clean

all: check

demo:           # two overlapping networks on a real libvirt, in a sandbox (root)
	contrib/demo

test:           # everything (root)
	tests/run

check:          # linters and unit tests, without root
	contrib/check

bench:          # how fast it is, beside others (root)
	bench/run

package:        # for Debian, without root
	contrib/build-package

install:        # on this machine (root)
	contrib/install

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache
