"""The Storybook world: pictures composed from openly licensed artwork, with exact ground truth.

Read in this order: `palette` and `layers` (how a part is drawn in any colour), `artwork` (where parts come from),
`kinds/` (person, cat, vehicle: what stays and what may change), `scenes`, `styles`, `sampling` (what is in picture
`i` of a split), `picture` (drawing it, with masks), `captions` (saying it), `dataset` (feeding a training), `personal` and `task`
(training an adapter).
"""
