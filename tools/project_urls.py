"""A metadata hook of hatchling: the project's URLs, from the GitHub repository whose workflow builds it.

So a fork's packages point to the fork, and a build on somebody's own machine claims no home.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def urls(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the URLs of the repository that GitHub Actions runs for; none elsewhere."""
    server, repository = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY")
    if not server or not repository:
        return {}
    home = f"{server}/{repository}"
    # files at the tag of this release
    files = f"{home}/blob/{environment.get('GITHUB_REF_NAME') or 'HEAD'}"
    return {
        "Homepage": home,
        "Documentation": f"{files}/README.md",
        "Changelog": f"{files}/CHANGELOG.md",
        "Issues": f"{home}/issues",
        "Security": f"{files}/SECURITY.md",
        "Source": home,
    }


class ProjectUrls(MetadataHookInterface):
    """Fills in `project.urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the URLs; hatchling keeps those of an sdist that it builds from."""
        metadata["urls"] = urls(os.environ)
