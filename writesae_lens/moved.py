"""Module names from before the modules of this package were moved; `hooked_models.moved` keeps them alive."""

OLD_NAMES = {
    "writesae_lens.activations": "writesae_lens.saes.activations",
    "writesae_lens.atoms": "writesae_lens.report.atoms",
    "writesae_lens.checkpoints": "writesae_lens.published.checkpoints",
    "writesae_lens.commands": "writesae_lens.cli.experiments",
    "writesae_lens.config": "writesae_lens.saes.config",
    "writesae_lens.experiments.amplification": "writesae_lens.experiments.amplify",
    "writesae_lens.experiments.erasure": "writesae_lens.experiments.erase",
    "writesae_lens.experiments.inputs": "writesae_lens.experiments.passages",
    "writesae_lens.experiments.readers": "writesae_lens.experiments.trace",
    "writesae_lens.experiments.replacement": "writesae_lens.experiments.replace",
    "writesae_lens.experiments.signs": "writesae_lens.experiments.sign",
    "writesae_lens.history": "writesae_lens.saelens.history",
    "writesae_lens.hub": "writesae_lens.published.hub",
    "writesae_lens.manifest": "writesae_lens.published.manifest",
    "writesae_lens.optimizer": "writesae_lens.saes.optimizer",
    "writesae_lens.packed": "writesae_lens.saes.packed",
    "writesae_lens.rank1": "writesae_lens.saes.rank1",
    "writesae_lens.releases": "writesae_lens.published.releases",
    "writesae_lens.sae": "writesae_lens.saes.sae",
    "writesae_lens.sharing": "writesae_lens.published.sharing",
    "writesae_lens.train": (
        "writesae_lens.saelens.runner",
        "writesae_lens.cli.training",
        "hooked_models.zoo",
    ),
    "writesae_lens.training_sae": "writesae_lens.saes.training_sae",
    "writesae_lens.win_rate": "writesae_lens.saelens.win_rate",
}
"""The present module of each old name of this package."""
