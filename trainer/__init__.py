"""The suite, in reading order.

train        the story of a run: from a plan to an outcome
plan         a recipe with every unit worked out, pure
recipe       one page of science; find, load, override, digest
ingredients  losses, optimizers, learning rates, mixing, augmentation, averaging, parts of a
             model: one small frozen class each
streams      all randomness, a pure function of (seed, purpose, indices)
data         index, order, decoding, jpeg (only what a crop needs of a file), sets, loader, arriving (on a GPU), and the
             preparation of a micro-batch on the device; packed: files of many images, as shards (tar), parquet (with
             columns) or hf (`datasets`), their listing and their members; beton: the file
             that ffcv reads, beton_writer: writes it; ffcv_stream: the loader's micro-batches as ffcv makes them
parity       what ffcv reads against what the torch loader reads; data_cli: its command, and that of the writer
models       timm models with a page's options and parts; start: their first weights; statistics: of their norms
pieces       a micro-batch that memory does not hold, in pieces; recompute: activations made again instead of kept;
             small_maps: what a convolution on a CPU can leave out
state        what a run carries from step to step, saved and taken up again
evaluate     exact counts over one pass
ranks        several processes that make one run; place: which this is, meeting: how they come and end together,
             gradients: their sum; launch: starts them, ranks_cli: trains on them; slurm_cli: a job file
job          from what was asked to a plan, from a plan to a stored row
results      the row and the store
adapt        what a data set's profile changes in a page
profiles     facts of data sets
overrides    departures from a page, recorded
load, check  YAML to typed values, or one line with file and line; tree: paths into pages
settings     where and on what a run runs
checkpoint   files that a kill leaves whole; saver: writes them beside the training; kept_file: what grows and loses
             nothing; disk: one that takes nothing; room: is there enough; ending: what a run leaves at its end, and where
export       the trained model as timm takes it; run_folder: what a run left, read back; rescore: its score once more
log          the only writer to the terminal and the curves during a run; pictures: what it shows; board: for TensorBoard
explain      where each value comes from; show: what the commands print
matrix       every page on a model of every family: one real step, or the reason why not
ablation     one question's page and the cells that answer it; designs: how they are made; budget: how long they train
cells        a cell's text, plan and key, by which it meets its row; pace: how fast a run would be here
ablation_cli what `plan --ablation` prints
ablate       a sweep: every cell that has no row, run to it once; sweep_table: what it shows; ablate_cli: its command
cell_run     one seed of a cell, run; local_cells: in forks of one process; ray_cells: on a cluster
dry_run      one step of every shape of cell; failures: what a cell without a row left; row_urls: a store behind a URL
claims       the lock: at most one process in a folder, on any number of machines
guard        what a run asks before each step and write: the lock, faults to inject
comparisons  statistics of few repeats: spread, intervals, p, the seeds needed
questions    an ablation without its plans, cached; table_rows: its rows out of a large store, by a row_index
tables       one ablation as one typed table; table_notes: what stands under it
table_query  sort=, columns=, filter=; table_texts: its words; table_formats, table_latex: Markdown, CSV, LaTeX
report       one ablation as a page that opens from disk; report_page: its words; report_figures, report_scales: its figures;
             report_curves: the curves kept for it; report_hparams: the rows for TensorBoard
compare      two runs side by side; reproduce: a row run again from its own record; table_show, table_cli
cli          commands
doctor       does this machine train; doctor_finding: a line of it, doctor_probes, doctor_steps: what it asks and tries; doctor_show, doctor_cli
bench_run    what each part of a run could do alone, and what holds it up; bench: turns and medians; bench_data; bench_cli
bench_gpu    the same on a GPU beside bench_timm, a loop of timm's parts; bench_targets: the floor, and what was to be reached
verify       is a run folder whole, and its row's; verify_curves: of metrics.jsonl; verify_show, verify_cli
inject       faults on purpose; drill: all of them on the digits, what was promised and seen; drill_cli: its command
stop, errors, provenance; names: what may become a file; terminal: what may be printed; json_text; cores

range_test   the story of `make lr-find`: which learning rate, or other number, to train with; `lr_find` for notebooks
range_race   the decision, from curves alone; range_rules: what one curve says
ramp, trial  a number of the page set anew at every step; one trial along the road of a run
held_out     the slice of train that choosing looks at; floor: the loss of knowing nothing but the classes' shares
range_files, range_pictures, range_show, lr_find_cli   what it leaves, draws, prints; its command
"""

from __future__ import annotations


def __getattr__(name: str):
    """`from trainer import lr_find` imports torch and timm when it is asked for, not when the package is."""
    if name == "lr_find":
        import importlib

        return importlib.import_module("trainer.lr_finder.api").lr_find
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
