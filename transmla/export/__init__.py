"""Write an export: its files, its manifest and its model card; and push it to the Hub.

- ``output``: check the folder that is to be written, before torch is imported.
- ``workspace``: the folder ``OUTPUT.partial`` of an unfinished conversion, from which a killed run resumes.
- ``manifest``: read and write the manifest ``transmla.json``.
- ``signature``: the part of the manifest that says what the export computes and contains.
- ``hashes``: names, hashes and fingerprint of an export's files; index of the shards.
- ``tokenizer``: write the tokenizer, the chat template and the generation config.
- ``card``: write the model card ``README.md``.
- ``evaluation_table``: the table of an evaluation, for the terminal, the card and the report.
- ``push``: upload a verified export to the Hub in one commit.
"""
