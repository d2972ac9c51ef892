"""What the Helm chart makes of values: its objects, the notes, and the YAML itself with --yaml.

python docs/chart.py [--yaml] [VALUES.yaml]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

try:
    import helm_python as helm
except ModuleNotFoundError:
    sys.exit("helm-python-sdk has no wheel for this machine: helm template does the same")

HELM: Final = Path(__file__).parents[1] / "examples" / "helm"
NOTES: Final = "NOTES.txt"


def rendered(values: dict[str, Any]) -> dict[str, str]:
    """Return the texts of a release, by the names of their templates; those that are empty not."""
    with helm.Chart.load(HELM / "asyncstore-service") as chart:
        texts = chart.render(values, name="orders", namespace="shop")
    return {Path(name).name: text.strip() for name, text in texts.items() if text.strip()}


def show(values: Path, *, as_yaml: bool) -> None:
    """Print what becomes of a file of values."""
    try:
        texts = rendered(helm.values_from_yaml(values.read_text()))
    except helm.HelmError as error:
        sys.exit(f"{values}: {error}")
    notes = texts.pop(NOTES)
    if as_yaml:
        print("\n---\n".join(texts.values()))
        return
    for text in texts.values():
        made = helm.values_from_yaml(text)
        print(f"{made['apiVersion']:<14} {made['kind']:<24} {made['metadata']['name']}")
    print(f"\n{notes}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--yaml", action="store_true")
    parser.add_argument("values", type=Path, nargs="?", default=HELM / "orders-values.yaml")
    arguments = parser.parse_args()
    show(arguments.values, as_yaml=arguments.yaml)
