"""The templates of the pages."""

from __future__ import annotations

from datetime import datetime, timezone

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_ENVIRONMENT = Environment(
    loader=PackageLoader("bacinfer.report", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: object) -> str:
    """A page: a template that extends ``base.html``, with its values, one of which is the `title`."""
    written = datetime.now(timezone.utc).isoformat(timespec="minutes")
    return _ENVIRONMENT.get_template(template).render(style=source("page.css"), written=written, **values)


def source(name: str) -> Markup:
    """A file beside the templates that is none itself."""
    assert _ENVIRONMENT.loader is not None
    return Markup(_ENVIRONMENT.loader.get_source(_ENVIRONMENT, name)[0])
