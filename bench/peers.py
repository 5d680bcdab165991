"""Packages of others that benchmarks time where they are installed: what a table says of one that cannot be timed."""


def reason(error: Exception, package: str) -> str:
    """Why there is no number: `package`, by the name it is imported by, is missing, or else the first line of the error."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return "not installed"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
