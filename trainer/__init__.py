"""The suite, in reading order.

    train        the story of a run: from a plan to an outcome
    plan         a recipe with every unit worked out, pure
    recipe       one page of science; find, load, override, digest
    ingredients  losses, optimizers, learning rates, mixing, augmentation, averaging, parts of a
                 model: one small frozen class each
    streams      all randomness, a pure function of (seed, purpose, indices)
    data         index, order, decoding, sets, loader, and the preparation of a micro-batch on the device
    models       timm models with a page's options and parts; start: their first weights; statistics: of their norms
    state        what a run carries from step to step, saved and taken up again
    evaluate     exact counts over one pass
    job          from what was asked to a plan, from a plan to a stored row
    results      the row and the store
    adapt        what a data set's profile changes in a page
    profiles     facts of data sets
    overrides    departures from a page, recorded
    load, check  YAML to typed values, or one line with file and line; tree: paths into pages
    settings     where and on what a run runs
    checkpoint   files that a kill leaves whole
    export       the trained model as timm takes it; run_folder: what a run left, read back; rescore: its score once more
    log          the only writer to the terminal and the curves during a run; pictures: what it shows
    explain      where each value comes from; show: what the commands print
    matrix       every page on a model of every family: one real step, or the reason why not
    cli          commands
    stop, errors, provenance
"""
