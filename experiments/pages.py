"""Tables in pages of docs, between the markers `<!-- NAME -->` and `<!-- /NAME -->`."""


def with_table(page: str, name: str, table: str) -> str:
    """`page` with `table` between the markers of `name`. Raises ValueError if it has no such place."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in page or end not in page.split(begin, 1)[1]:
        raise ValueError(f"no place for {name}: {begin.strip()} and {end} are missing")
    before, rest = page.split(begin, 1)
    return before + begin + table + "\n" * bool(table) + end + rest.split(end, 1)[1]
