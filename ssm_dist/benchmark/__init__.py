"""Times a grid of cases on the engine as users call it, beside their floors, and makes reports of such runs.

`cases` says what is measured: B prompts of P tokens with G new tokens each. `floors` has the bytes and
operations that a case cannot do without, and the device's rates. `timing` runs one case, and tells what
follows from the times at which tokens came; `breakdown` asks the profiler where the time goes. `program`
runs models, codecs and backends one after the other, and makes the document of a run. `page` makes a report
of one or many documents, the peers' among them, with `tables` and `plots`, against `targets`.
"""
