"""`GET /`: the page. One file, nothing fetched from elsewhere, and a policy under which nothing else can run in it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from pykd.evaluation.page import TEMPLATES
from pykd.serve.state import State

PAGE = Path(__file__).parent / "pages" / "index.html"


def router(state: State) -> APIRouter:
    """The route. The page holds no data: it asks for all of it, with the token where there is one."""
    routes = APIRouter(tags=["page"])
    state.public.add("/")
    page = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": policy(page),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @routes.get("/", summary="The web page", response_class=HTMLResponse)
    def shown() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return routes


def policy(page: str) -> str:
    """Content-Security-Policy of a page: its own script and style by their hashes, requests to its own service only.

    A report is shown in a frame of the page and so under the page's policy: the hash of its style is there too.
    """
    scripts = [digest(text) for text in re.findall(r"<script>(.*?)</script>", page, re.S)]
    styles = [digest(text) for text in re.findall(r"<style>(.*?)</style>", page, re.S)]
    styles.append(digest(f"\n{(TEMPLATES / 'report.css').read_text(encoding='utf-8')}\n"))
    return (
        f"default-src 'none'; script-src {' '.join(scripts)}; style-src {' '.join(styles)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def digest(text: str) -> str:
    """What a policy calls an inline script or style (CSP 3, 6.7.2.3).

    >>> digest("")
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
