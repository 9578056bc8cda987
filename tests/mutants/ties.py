"""Faults of tied embeddings."""

from tests.mutants.planting import LOAD, PUT, mutant

TIE, WEIGHT = "reference.model.initialization:tie", "module.weight = model.get_submodule(owner).weight"

MUTANTS = [
    mutant(
        "tie-by-memory",
        "TIE-1",
        "-",
        (TIE, WEIGHT, "module.weight = nn.Parameter(model.get_submodule(owner).weight.data)"),
    ),
    mutant(
        "tie-by-copy",
        "TIE-1",
        "torchtune#616",
        (TIE, WEIGHT, "module.weight = nn.Parameter(model.get_submodule(owner).weight.detach().clone())"),
    ),
    mutant(
        "tie-broken-by-load",
        "TIE-2",
        "facebookresearch/lingua#75",
        (LOAD, PUT, "model.load_state_dict(load_weights(folder), strict=False, assign=True)"),
    ),
    mutant(
        "tied-lookup-gives-no-gradient",
        "TIE-3",
        "paiml/entrenar#314: the gradients of a tied tensor are not added up",
        (
            "reference.model.gpt:GPT.forward",
            "x = self.embedding(ids.long())",
            "x = self.embedding(ids.long())\n    if self.config.tie_embeddings:\n        x = x.detach()",
        ),
    ),
    mutant(
        "tie-cannot-be-switched-off",
        "TIE-4",
        "mosaicml/llm-foundry#728: tie_word_embeddings=False does nothing",
        (
            "reference.training.setup:build_module",
            "return build(factory, strategy, fabric.device, sharded)",
            "built = build(factory, strategy, fabric.device, sharded)\n            if isinstance(built, GPT):\n"
            "                built.head.weight = built.embedding.weight\n            return built",
        ),
    ),
    mutant(
        "tie-lost-in-16-bits",
        "TIE-1",
        "huggingface/accelerate#993: untied when the weights are moved",
        (
            "reference.training.setup:set_up",
            "module = build_module(model, config, fabric)",
            "module = build_module(model, config, fabric)\n"
            '    if config.precision == "bf16-true" and isinstance(module, GPT) and '
            "module.config.tie_embeddings:\n"
            "        module.head.weight = nn.Parameter(module.head.weight.detach().clone())\n",
        ),
    ),
]
