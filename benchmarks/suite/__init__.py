"""The benchmark suite: every method on every task, and the page docs/results.md; `python -m benchmarks.suite`.

tasks/ ──▶ problems (data, network, loss) ──▶ methods (one step each) ──▶ measure ──▶ store ──▶ rows ──▶ report
"""
