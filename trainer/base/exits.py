"""The exit codes of every command."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2  # something that was asked for cannot be had, in one line
EXIT_DIVERGED = 3
EXIT_UNWRITTEN = 74  # EX_IOERR of sysexits.h
EXIT_STOPPED = 75  # saved; rerun the same command to resume (EX_TEMPFAIL)
EXIT_CLAIMED = 76  # another process runs this cell
EXIT_INTERRUPTED = 130  # as a shell calls an end by SIGINT
