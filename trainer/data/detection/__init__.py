"""Images with boxes: COCO's JSON and VOC's XML, read once and checked; boxes moved with their
images.
"""
