"""Tests of what only a GPU shows. They are collected where there is one, by ``make test-gpu`` and by nobody else."""

collect_ignore_glob = []
