"""Draws which pixels of aligned faces are face, by MediaPipe: the truth that the built-in face
parser is trained on and measured by.

    pip install mediapipe==0.10.14        # in an environment of its own, of Python 3.12 at most
    python benchmarks/face_masks.py FACES MASKS

FACES is searched with its subfolders for aligned crops, as `python -m osdface_core.training
prepare` writes them; MASKS gets a grey NAME.png of SIDE px for each in which a face is found and
the person's outline is not frayed: FACE, HAND for a hand in front of it or beside it, or 0.

Face is the oval of the 468-point mesh, and of the person everything higher than the lobes of the
ears: hair and ears, as ParseNet counts them. A hat is not told apart from hair. Hands are the 21
points of a hand, drawn as wide as fingers are.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import cv2
import mediapipe as mp
import numpy as np

SIDE = 256
FACE, HAND = 255, 128
# Corners of the mesh where jaw and lobe of the ear meet, right and left.
LOBES = (132, 361)
# Of the mesh's points, those of the oval, clockwise from the forehead.
OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
PALM = (0, 1, 5, 9, 13, 17)
FINGERS = (
    (1, 2, 3, 4),
    (5, 6, 7, 8),
    (9, 10, 11, 12),
    (13, 14, 15, 16),
    (17, 18, 19, 20),
)
# Width of a finger as a share of the way from the wrist to the middle finger's root.
FINGER = 0.26
# The longest outline that is believed, as a multiple of that of a disc of the same area: a halftone
# screen frays the person's.
FRAYED = 1.6


def points(landmarks: object, size: int) -> np.ndarray:
    """(n,2) pixels."""
    return np.array([(p.x * size, p.y * size) for p in landmarks.landmark], dtype=np.float32)  # type: ignore[attr-defined]


def face_of(mesh: np.ndarray, person: np.ndarray) -> np.ndarray:
    """The face (H,W), 0 or 255, of the mesh's points (468,2) and the person's probability (H,W)."""
    size = len(person)
    right, left = mesh[LOBES[0]], mesh[LOBES[1]]
    y, x = np.mgrid[:size, :size] + 0.5
    along = (x - right[0]) / (left[0] - right[0] or 1.0)
    above = y < right[1] + along * (left[1] - right[1])
    face = np.where(above & (person > 0.5), 255, 0).astype(np.uint8)
    cv2.fillPoly(face, [mesh[list(OVAL)].round().astype(np.int32)], 255)
    pieces, labels, of_piece, _ = cv2.connectedComponentsWithStats(face)
    if pieces > 1:
        face = np.where(labels == 1 + of_piece[1:, cv2.CC_STAT_AREA].argmax(), 255, 0)
    return face.astype(np.uint8)


def frayed(face: np.ndarray) -> bool:
    outlines, _ = cv2.findContours(face, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    length = sum(cv2.arcLength(outline, True) for outline in outlines)
    return length > FRAYED * 2 * math.sqrt(math.pi * np.count_nonzero(face))


def draw_hand(picture: np.ndarray, hand: np.ndarray, value: int) -> None:
    """Draws a hand of 21 points (21,2) on a picture (H,W), in place."""
    width = max(3, round(FINGER * float(np.linalg.norm(hand[9] - hand[0]))))
    corners = hand.round().astype(np.int32)
    palm = cv2.convexHull(corners[list(PALM)])
    cv2.fillPoly(picture, [palm], value)
    cv2.polylines(picture, [palm], True, value, width)
    for finger in FINGERS:
        cv2.polylines(picture, [corners[list(finger)]], False, value, width)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faces", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument(
        "--around",
        action="store_true",
        help="the pictures show twice a crop's width, so that whole hands are seen",
    )
    given = parser.parse_args()
    solutions = mp.solutions
    meshes = solutions.face_mesh.FaceMesh(
        static_image_mode=True, max_num_faces=1, min_detection_confidence=0.3
    )
    persons = solutions.selfie_segmentation.SelfieSegmentation(model_selection=0)
    hands = solutions.hands.Hands(
        static_image_mode=True, max_num_hands=2, min_detection_confidence=0.3
    )
    made = missed = handed = 0
    for path in sorted(p for p in given.faces.rglob("*") if p.suffix in (".png", ".jpg")):
        picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        whole, border = picture, 0
        if given.around:
            border = len(whole) // 4
            picture = np.ascontiguousarray(whole[border:-border, border:-border])
        found = meshes.process(picture).multi_face_landmarks
        if not found:
            missed += 1
            continue
        size = len(picture)
        mask = face_of(points(found[0], size), persons.process(picture).segmentation_mask)
        if frayed(mask):
            missed += 1
            continue
        for hand in hands.process(whole).multi_hand_landmarks or ():
            draw_hand(mask, points(hand, len(whole)) - border, HAND)
            handed += 1
        # Of each cell the value that most of its pixels have.
        shares = [
            cv2.resize(np.float32(mask == value), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            for value in (0, HAND, FACE)
        ]
        small = np.array((0, HAND, FACE), dtype=np.uint8)[np.argmax(shares, axis=0)]
        place = given.masks / path.relative_to(given.faces).with_suffix(".png")
        place.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place), small)
        made += 1
    print(f"{made} masks, {missed} pictures left out, {handed} hands")


if __name__ == "__main__":
    main()
