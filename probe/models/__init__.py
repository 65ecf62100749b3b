"""Loading models, and turning episodes into tokens whose roles are known.

``load`` gives a :class:`~probe.models.model.Model`; ``Model.encode`` renders an episode with the model's own chat
template, tokenises it and returns an encoding with its :class:`~probe.models.token_map.TokenMap`; ``collate`` pads
encodings into a batch. What differs between model families lies in one small file a family.
"""
