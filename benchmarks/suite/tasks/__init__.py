"""All tasks by name.

How targets were chosen: the published or asked for value where there is one; else, after short trials of Adam at two or
three rates on one seed, a round value that the best of them reached within 2 to 8 s of CPU time. Those of cnn-cifar and
the easier one of sine-100 are guesses.
"""

from benchmarks.suite.tasks.classes import CLASSES
from benchmarks.suite.tasks.curves import CURVES
from benchmarks.suite.tasks.images import IMAGES
from benchmarks.suite.tasks.regression import REGRESSION
from benchmarks.suite.tasks.sequences import SEQUENCES

TASKS = {task.name: task for task in (*CURVES, *REGRESSION, *IMAGES, *CLASSES, *SEQUENCES)}
