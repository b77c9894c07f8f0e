"""What every folder may use and that knows none of them: errors, names, streams of random numbers,
the terminal, the machine.
"""
