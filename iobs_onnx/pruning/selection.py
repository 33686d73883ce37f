"""Which sites a run prunes, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from iobs_onnx.errors import OptionError
from iobs_onnx.site import Candidates, Declined, Site
from iobs_onnx.sparsity import Pattern


def select(
    found: Candidates,
    patterns: Sequence[Pattern],
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> Candidates:
    """Return the sites to prune; those left out join the declined, each with its reason.

    Args:
        found: every candidate of the model.
        patterns: sites that cannot carry them all are declined.
        include: globs; if there are any, a site's name must match one.
        exclude: globs; a site whose name matches one is left as it is.

    Raises:
        OptionError: a glob matches no site.
    """
    include, exclude = tuple(include), tuple(exclude)
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(fnmatchcase(site.name, glob) for site in found.sites):
                raise OptionError(
                    f"{option} {glob!r} matches no site; `iobs-onnx inspect` lists their names"
                )
    sites, declined = [], list(found.declined)
    for site in found.sites:
        if reason := _reason(site, patterns, include, exclude):
            declined.append(decline(site, reason))
        else:
            sites.append(site)
    return Candidates(tuple(sites), tuple(declined))


def decline(site: Site, reason: str) -> Declined:
    """Return the record of a site that is left as it is."""
    return Declined(site.name, site.nodes, site.op_type, site.initializer, site.shape, reason)


def _reason(
    site: Site, patterns: Sequence[Pattern], include: tuple[str, ...], exclude: tuple[str, ...]
) -> str | None:
    if include and not any(fnmatchcase(site.name, glob) for glob in include):
        return "not included: its name matches no --include"
    for glob in exclude:
        if fnmatchcase(site.name, glob):
            return f"excluded by --exclude {glob}"
    for pattern in patterns:
        if misfit := pattern.misfit(site.run):
            return f"{pattern} does not fit: {misfit}"
    return None
