"""What a figure says."""


def texts(ax):
    return [t.get_text() for t in ax.texts]
