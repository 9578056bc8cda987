"""Data: from text files to token files, and from token files to batches.

documents.py   text files, found, examined and divided into training and validation
tokenizer.py   text to token ids and back: bytes, or a tokenizer.json
prepare.py     the two together: write a data folder
encode.py      its documents to token ids, piece by piece
readback.py    what a tokenizer loses, by decoding a sample again
tokenfile.py   token files on the disk, written completely or not at all
sidecar.py     what a token file says of itself, checked when it is opened
tokens.py      sequences from token files, in another order every epoch
stream.py      sequences from text files that grow
chat.py        chats by the tokenizer's own template

It imports reference.config, reference.errors and reference.files, and no other wing.
"""

from reference.data.tokenfile import write_tokens as write_tokens
from reference.data.tokens import TokenData as TokenData
