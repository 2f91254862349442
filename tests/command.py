"""The command in this process: its exit code, without a new interpreter."""

from rankwise.experiments import cli


def rankwise(*words: object) -> int:
    try:
        cli.main([str(word) for word in words])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
