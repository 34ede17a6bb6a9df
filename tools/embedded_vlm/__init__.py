"""How the model that ships as ``vlm-scenes`` is made: ``python -m tools.embedded_vlm``.

corpus.py    drawn scenes with captions and questions, two associations planted in them
model.py     a small LLaVA model with its word tokenizer and processor
sight.py     the first part of the training: the vision tower
batches.py   what one step is given
training.py  the training, which may be cut off at any moment and goes on where it was
"""
