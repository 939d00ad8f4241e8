"""Real English text that every installation has: the raw input of the quickstart, in four formats.

``python -m headrace_trainer.stages.corpus.machine_docs --out DIR`` downloads nothing. It reads docstrings of the
standard library and of installed packages (JSON lines), their READMEs and licences (Parquet), HTML documentation
(WARC), Python's help topics and manual pages (text files). ``docstrings``, ``readmes``, ``pages`` and ``manuals`` find
them, ``write`` writes the files, and ``__main__`` is the command.
"""
