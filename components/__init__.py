"""One Kubeflow component a step, each a signature and one call; `components.launch` starts the step's processes."""

IMAGE = "darkroom/training-python:dev"  # a stand-in: `darkroom compile --site` puts the site's image, by digest, in its place
