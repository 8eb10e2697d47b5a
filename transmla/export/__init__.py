"""Write an export: its files, its manifest and its model card; and push it to the Hub.

- ``output``: check the folder that is to be written, before torch is imported.
- ``lock``: keep a second process out of it.
- ``workspace``: the folder ``OUTPUT.partial`` of an unfinished conversion, from which a killed run resumes.
  ``state`` saves and reads the state in it; ``unfinished`` looks into it without changing it.
- ``manifest``: read and write the manifest ``transmla.json``.
- ``signature``: the part of the manifest that says what the export computes and contains.
- ``hashes``: names, hashes and fingerprint of an export's files; index of the shards.
- ``tokenizer``: write the tokenizer, the chat template and the generation config.
- ``source_files``: files of the source that travel into the export as they are.
- ``travel``: the record of a conversion inside ``config.json``.
- ``card``: write the model card ``README.md``.
- ``evaluation_table``: the table of an evaluation, for the terminal, the card and the report.
- ``push``: upload a verified export to the Hub in one commit.
"""
