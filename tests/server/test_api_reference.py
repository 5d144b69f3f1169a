"""docs/api.md is what the server says of itself."""

from __future__ import annotations

import copy

import api_reference
import httpx


def test_the_page_is_current(client: httpx.Client) -> None:
    """`python tests/support/api_reference.py` writes it anew."""
    document = client.get("/openapi.json").json()
    assert api_reference.page_of(copy.deepcopy(document)) == api_reference.PAGE.read_text("utf-8")
    changed = copy.deepcopy(document)
    changed["components"]["schemas"]["ResponsesRequest"]["properties"]["new_field"] = {"type": "boolean"}
    assert "| `new_field` | boolean |  |" in api_reference.page_of(changed)


def test_each_link_leads_somewhere() -> None:
    page = api_reference.PAGE.read_text("utf-8")
    headings = {api_reference._slug(line.lstrip("# ")) for line in page.splitlines() if line.startswith("#")}
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links
    assert links <= headings
