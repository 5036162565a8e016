"""The sub-commands of `nextflow-hf`; cli.py lists them.

Every module here opens with the standard library alone: what a command needs is imported when it runs, so that
`--help` takes no time.
"""
