"""One-line bugs, planted one at a time: does any test notice?

    cd tests && python -m mutate trio_worker/core jobs=2

`mutants` finds the places, `record` knows which tests run which lines, `run` runs them in a forked
process in which the one module is the mutated one.
"""
