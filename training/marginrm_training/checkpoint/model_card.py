"""The model card of a checkpoint: a README with its measures and its use."""

from __future__ import annotations

from marginrm.manifest import Manifest

_MEANING = (
    "Rewards have no unit and no zero: only differences between responses to one prompt, from this checkpoint, mean "
    "something. The confidence that the first is better is sigmoid(difference / T)."
)
_RECORDED = (
    "`reward_manifest.json` records data, method, encoding, calibration and golden samples, which hold the texts of a "
    "few held-out pairs."
)


def model_card(manifest: Manifest) -> str:
    """Returns a README for the checkpoint."""
    method, calibration, metrics = manifest.method, manifest.calibration, manifest.metrics
    lines = [
        "---",
        "library_name: transformers",
        "tags: [reward-model, margin]",
        "---",
        f"# {manifest.name}",
        "",
        f"A reward model trained by marginrm from `{manifest.base_model}`"
        + (f" with the `{method.preset}` preset." if method else "."),
        "",
        "| measured on held-out pairs | |",
        "|---|---:|",
        *(
            f"| {name} | {metrics[name]:.4f} |"
            for name in ("accuracy", "bt_nll", "ece_before", "ece", "brier", "margin_mean", "margin_std")
            if name in metrics
        ),
        "",
        _MEANING + f" T is {calibration.temperature:.3f}." if calibration else _MEANING + " T is not fitted yet.",
        "",
        "```sh",
        "marginrm serve --model .",
        "```",
        "",
        _RECORDED,
    ]
    return "\n".join(lines) + "\n"
