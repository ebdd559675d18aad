"""What a sample may show or sound like, one file a modality. No torch here: loader and launcher read it.

`modality.Modality` is the base class; a class of its own in any importable module is a new modality, chosen by
`model.modalities.NAME.kind: package.module:Class`.
"""
