"""Nothing in, the pictures beside this file out: `python examples/draw.py` draws them again, byte for byte."""

from pathlib import Path

from pixtral_cli.tiny.scenes import Style, draw, random_scene, scene_rng

SEED = 30_000  # no seed of training
PICTURES = {  # name: number of the scene, size in px, shapes, share of text, share of text alone
    "shapes": (183, (224, 160), (3, 3), 0, 0),
    "sign": (16, (240, 120), (2, 2), 1, 0),
    "first": (49, (176, 176), (2, 2), 0, 0),
    "second": (79, (200, 144), (4, 4), 0, 0),
}


def main() -> None:
    for name, (number, size, shapes, text, alone) in PICTURES.items():
        style = Style(size=size, shapes=shapes, text_share=text, text_alone_share=alone)
        draw(random_scene(scene_rng(SEED, number), style)).save(Path(__file__).with_name(f"{name}.png"), optimize=True)


if __name__ == "__main__":
    main()
