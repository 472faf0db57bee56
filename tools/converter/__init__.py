"""The one engine behind the converters: raw files -> rows of tokens -> vocabularies -> a dataset. No OneFlow here.

    raw.py            finds raw files, cuts them into blocks of whole rows, reads a block as a table
    values.py         columns of any type as text or as numbers
    vocabulary.py     tokens: numbers for texts, counts in bounded memory, vocabularies and their files
    encoders.py       fields (category, bucket, quantile, hash, modulus) and the Encoder: raw columns -> global ids
    splits.py         which split a row belongs to
    rows.py           a block of raw rows -> tokens, as both engines need it
    spool.py          the shuffle
    writer.py         shards with equal row groups
    info.py           dataset_info.json, README.md of a dataset, growth
    publish.py        locks, unpublished folders, scratch folders
    arrow_engine.py   one machine, bounded memory
    spark_engine.py   many machines, the same rows
    convert.py        from options to a published dataset
"""
