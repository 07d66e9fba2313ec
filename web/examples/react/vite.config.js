import { fileURLToPath } from "node:url";
import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// `npm run dev` here beside `make run` there: /api/ goes to the relay, so that the page and it share an origin.
// REACT=18 builds the same with React 18.
const packages = fileURLToPath(new URL("../../node_modules/", import.meta.url));
const eighteen = process.env.REACT === "18" ? { "react-dom": `${packages}react-dom-18`, react: `${packages}react-18` } : {};

export default defineConfig({
  plugins: [react()],
  // In this folder two files are links into web/; in your own app they are copies.
  resolve: { preserveSymlinks: true, alias: eighteen },
  server: { proxy: { "/api": { target: process.env.RELAY_URL ?? "http://127.0.0.1:8787", ws: true } } },
});
