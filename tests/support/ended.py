"""What a run reported and left, to the bit."""

from safetensors.torch import load_file


class Ended:
    """What a run told and left: metrics, images and tables to the bit, weights of the saved model."""

    def __init__(self):
        self.metrics, self.images, self.tables, self.weights = {}, {}, {}, {}

    def log(self, step, metrics):
        for name, value in metrics.items():
            assert name not in self.metrics.setdefault(step, {}) or self.metrics[step][name] == value
            self.metrics[step][name] = value

    def image(self, key, step, pixels):
        self.images[key, step] = pixels.tobytes()

    def picture(self, file, pixels):
        self.images[file] = pixels.tobytes()

    def table(self, file, columns):
        self.tables[file] = {name: list(values) for name, values in columns.items()}

    def artifact(self, path, folder=None):
        for file in path.rglob("*.safetensors"):  # tensor by tensor: a header's order is left to chance
            self.weights |= {(file.name, name): tensor.numpy().tobytes() for name, tensor in load_file(file).items()}

    def __eq__(self, other):
        return vars(self) == vars(other)
