// The one setting: whether a missing weight file may be fetched while a graph runs.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "osdface.settings",
  settings: [
    {
      id: "OSDFace.download",
      category: ["OSDFace", "Weights", "Download"],
      name: "Fetch missing OSDFace weights when a graph needs them",
      tooltip: "Files are checked against their SHA-256 where one is known, else by the names and shapes of their tensors. Without this, run install.py once.",
      type: "boolean",
      defaultValue: false,
    },
  ],
});
